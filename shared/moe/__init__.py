"""Mixture of experts: routing, stacked experts, and the layer that takes the place of the MLP in Megatron's decoder."""
