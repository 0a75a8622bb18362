"""The accuracy of an exported folder: data sets, metrics, the run over the questions, its report and its plots.

To add a data set, add a `Layout` to `datasets.LAYOUTS`.
"""
