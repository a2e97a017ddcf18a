"""Every shipped configuration loads, and its resolved form reads back to the same value."""

import pytest

from pipelines.cli import config_program
from rlhf import config

NAMES = config.names()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_configuration_loads_and_reads_back(name, tmp_path):
    program = config_program(name)
    assert program is not None, (
        f"configs/{name}.yaml belongs to no program: see pipelines/programs.py"
    )
    cls = program.attribute("Config")
    loaded = config.load(cls, name, [], program.folder)
    config.save_yaml(loaded, tmp_path / "resolved.yaml")
    assert config.load(cls, tmp_path / "resolved.yaml", [], program.folder) == loaded


def test_configurations_are_yaml_data_only():
    strays = [p for p in config.configs_root().rglob("*") if p.is_file() and p.suffix != ".yaml"]
    assert strays == []
