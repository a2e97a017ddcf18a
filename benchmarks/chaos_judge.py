"""The judge of `benchmarks.chaos`: the share of red, and it hangs when it is told to."""

import os
import time


def redness(images, prompts, sources, folder):
    """Mean of the red channel over that of all, in [0, 1]. In the column `folder`, a file `hang`
    makes one call hang, a file `always` every call.
    """
    try:
        os.rename(f"{folder[0]}/hang", f"{folder[0]}/hung")
        time.sleep(3600)
    except FileNotFoundError:
        pass
    if os.path.exists(f"{folder[0]}/always"):
        time.sleep(3600)
    return [float(i[0].mean() / max(3 * i.mean(), 1e-6)) for i in images]
