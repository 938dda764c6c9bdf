"""The host: frozen weights, executor, service and the Flower ServerApp."""
