"""Where the work happens: in this process, or on Ray actors. Both speak in handles."""
