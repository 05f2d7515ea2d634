"""Several processes that train one policy: starting them, their device, collective calls, sharded weights."""
