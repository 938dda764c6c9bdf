"""Measurements: many tenants of one host against as many separate jobs, growth with the number of tenants, one call.

`tenants`, `scale` and `call` are the three benchmarks; `cli` runs them. Every process that is measured is one that a
benchmark starts itself (`processes`), so that the coordinator holds no model and needs no torch.
"""
