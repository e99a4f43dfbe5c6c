"""`make audit`, `make sbom`, and what writes the dashboard. No part of the product."""
