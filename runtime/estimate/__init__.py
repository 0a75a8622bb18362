"""The estimate of TTFT on chips that are not available: a roofline fitted on published times."""
