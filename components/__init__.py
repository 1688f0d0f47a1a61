"""The Kubeflow components; imported from a checkout only, to compile the pipelines."""
