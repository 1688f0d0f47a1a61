"""The platform's steps, one folder each; `common` holds what they share."""
