"""The planner: costs, memory, search for a plan, its measurement and calibration."""
