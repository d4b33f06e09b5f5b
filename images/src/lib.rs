//! The image builder.
