"""GAST: the rows that every layer follows, drawn by how their gradients align with a support set."""
