"""What the numbers of a label map stand for: a uint8 image of classes."""

MOST_CLASSES = 254
OUTSIDE = 254  # the filling around an image in evaluation
IGNORED = 255  # no class: a border, or what nobody has labelled
