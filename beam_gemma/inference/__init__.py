"""Beam's RunInference: model handlers and the transforms around them."""
