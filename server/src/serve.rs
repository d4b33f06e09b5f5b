//! stub
use std::path::PathBuf;
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum LogFormat { Text, Json }
#[derive(Debug)]
pub struct ServeOptions { pub site: PathBuf, pub config: Option<PathBuf>, pub log: Option<LogFormat> }
pub async fn serve(_o: ServeOptions) -> Result<(), crate::error::ServeError> { Ok(()) }
