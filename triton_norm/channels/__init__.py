"""Holds the memory layouts, plans, operators and derivatives of BatchNorm, GroupNorm and InstanceNorm."""
