"""What the router measures about itself, for Prometheus."""
