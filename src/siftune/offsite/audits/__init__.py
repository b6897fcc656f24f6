"""Audits: what a kit gives, and what it gives away."""
