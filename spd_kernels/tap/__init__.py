"""An identity whose backward pass collects the gradient's rows."""
