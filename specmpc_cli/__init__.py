"""specmpc: TD-MPC2 control at a fraction of the planner calls."""

__version__ = "0.1.0"
