"""SyncBatchNorm: its operators and their derivative."""
