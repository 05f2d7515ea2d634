"""Several processes that train one policy: starting them, their device, what they exchange, weights spread over them."""
