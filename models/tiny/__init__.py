"""`tiny`, a small trained FastVLM, with the generator of its scenes and questions and its training."""
