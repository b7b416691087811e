"""Deployment of the flow. Nothing in rcnn or flows imports this package."""
