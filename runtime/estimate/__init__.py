"""How long an answer should take on a chip that is not at hand: a roofline, fitted on published points."""
