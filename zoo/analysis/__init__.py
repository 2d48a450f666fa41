"""What a model looks at: probes give a number, a table or a picture about any model; plots draw."""
