"""Holds the operators and derivatives of SyncBatchNorm."""
