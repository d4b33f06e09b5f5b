//! The web page: the rack, live, and what a person may do there. Six files inside the program, no other host, nothing to build.

use kiln_protocol::Stage;
use std::fmt::Write;

/// Sent with every file of the page: nothing from elsewhere, no inline script or style.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// One file of the page.
#[derive(Debug)]
pub struct Asset {
    /// Its media type.
    pub content_type: &'static str,
    /// Its bytes.
    pub body: String,
}

/// The file at an absolute path, if it is one of the page's.
pub fn asset(path: &str) -> Option<Asset> {
    let (content_type, body) = match path {
        page if page == "/" || page.starts_with("/m/") => {
            ("text/html; charset=utf-8", include_str!("index.html").replace("<!--STAGES-->", &stages()))
        }
        "/app.js" => ("text/javascript; charset=utf-8", include_str!("app.js").to_owned()),
        "/actions.js" => ("text/javascript; charset=utf-8", include_str!("actions.js").to_owned()),
        "/about.js" => ("text/javascript; charset=utf-8", include_str!("about.js").to_owned()),
        "/people.js" => ("text/javascript; charset=utf-8", include_str!("people.js").to_owned()),
        "/style.css" => ("text/css; charset=utf-8", include_str!("style.css").to_owned()),
        _ => return None,
    };
    Some(Asset { content_type, body })
}

/// The stages in order, as list items: the page takes its labels from here, as everything does.
fn stages() -> String {
    Stage::ALL.iter().fold(String::new(), |mut html, stage| {
        write!(html, "<li data-stage=\"{stage}\">{}</li>", stage.label()).expect("writing to a String cannot fail");
        html
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_names_no_other_host() {
        let files: Vec<String> = ["/", "/app.js", "/actions.js", "/people.js", "/about.js", "/style.css"]
            .iter()
            .map(|p| asset(p).unwrap().body)
            .collect();
        assert!(files.iter().map(String::len).sum::<usize>() <= 100 * 1024);
        assert!(files.iter().all(|f| !f.contains("http://") && !f.contains("https://") && !f.contains("//cdn")));
        assert!(asset("/other").is_none());
    }

    #[test]
    fn nothing_on_the_page_needs_an_inline_script_or_style() {
        let page = asset("/").unwrap().body;
        assert!(!page.contains("style=") && !page.contains("<style") && !page.contains("javascript:"));
        assert!(page.split("<script").skip(1).all(|script| script.starts_with(" src=\"/")), "{page}");
        let handler =
            page.split(['<', '>']).any(|tag| tag.split(' ').skip(1).any(|a| a.starts_with("on") && a.contains('=')));
        assert!(!handler, "an inline handler");
        assert!(CONTENT_SECURITY_POLICY.contains("default-src 'none'") && !CONTENT_SECURITY_POLICY.contains("unsafe"));
    }

    #[test]
    fn the_pages_labels_are_the_stages_in_order() {
        let page = asset("/").unwrap().body;
        let mut rest = page.as_str();
        for stage in Stage::ALL {
            let at = rest.find(&format!(">{}</li>", stage.label())).expect("each stage follows the one before");
            rest = &rest[at..];
        }
    }
}
