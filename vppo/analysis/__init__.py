"""Where a model looks: the dependency of every token of its responses, in tables, figures and pages."""
