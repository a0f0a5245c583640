"""Generated tasks with exact verifiers."""
