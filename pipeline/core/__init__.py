"""What every stage shares: the runner, prefetching, worker processes, devices."""
