"""One method a file: settings as a frozen dataclass, the maths as a plain `nn.Module`."""
