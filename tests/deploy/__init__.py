"""What `deploy/` offers, used as an admin does: Prometheus, kustomize, a container."""
