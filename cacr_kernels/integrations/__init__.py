"""The losses in the form that other libraries want; each module needs its library and nothing here imports it.

- :mod:`cacr_kernels.integrations.cacr_ssl`: the functions of the authors' published scripts
- :mod:`cacr_kernels.integrations.pytorch_metric_learning`
- :mod:`cacr_kernels.integrations.sentence_transformers`
"""
