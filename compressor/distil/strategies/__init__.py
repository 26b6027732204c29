"""Data strategies: which samples a stage trains on (``pool``) and how they are drawn (``draws``)."""
