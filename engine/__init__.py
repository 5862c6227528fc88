"""HOW a run is run: command line, configuration, data, DeepSpeed, checkpoints, evaluation, report."""
