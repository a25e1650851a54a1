"""LayerNorm and RMSNorm: what a call launches, its operators and its derivative."""
