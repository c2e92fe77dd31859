"""What a generator's samples are worth: tensors in, plain floats out; a score goes nowhere without its `Protocol`."""
