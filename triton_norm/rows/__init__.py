"""Holds the plans, operators and derivatives of LayerNorm and RMSNorm."""
