"""The model: what travels with every K-Adapter repository."""
