"""From a checkpoint and calibration text to a smaller checkpoint: importance, plan, trim."""
