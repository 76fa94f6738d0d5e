"""On what: processes, devices, DDP and ZeRO."""
