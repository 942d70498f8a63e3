"""Models that take images, through mlx-vlm, which is optional.

families says which architectures; picture decodes a file; reader turns pictures into tokens and
pixels; image_prompt is a prompt with images in it; image_model is the model as the engine calls it.
"""
