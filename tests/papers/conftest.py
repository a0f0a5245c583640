from tests.rl.conftest import grid, random_inputs

__all__ = ["grid", "random_inputs"]
