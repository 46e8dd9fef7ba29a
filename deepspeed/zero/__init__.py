"""Sharding: what ZeRO does, on flat units. Read stage, layout, unit, grouping, gradients, reducer, optimizer."""
