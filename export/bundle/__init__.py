"""Bundles: a model folder packaged for an app, and validated against the app's loader."""
