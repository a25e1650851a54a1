"""Makes the sections of the report's page, which `perf.report` puts together."""
