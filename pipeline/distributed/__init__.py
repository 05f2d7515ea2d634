"""Several processes that train one policy: starting them, what they exchange, weights spread over them."""
