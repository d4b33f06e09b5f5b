//! The page of one machine in a real browser: what its certificate and its hardware class say.

use crate::certificates::{issued, revoke_key, wanting, works};
use crate::classes::box_with;
use crate::common::*;
use crate::inventory::post;
use crate::web::{browser, text_of};
use fantoccini::Locator;
use hyper::StatusCode;
use kiln_release::CertificatePolicy;
use serde_json::json;

#[tokio::test]
async fn the_page_of_a_machine_shows_its_certificate_and_its_hardware_class() {
    let site = TestSite::new();
    let manifest = site.publish_as(2, wanting(CertificatePolicy::Approved));
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &manifest);
    works(&server, &mut agent).await;
    let Some((driver, page)) = browser().await else { return };
    page.goto(&format!("http://{}/m/rack-1", server.http)).await.unwrap();
    text_of(&page, "certificate", |text| text.contains("None, or none that is not over.")).await;
    text_of(&page, "class", |text| text.contains("Not known: no inventory came")).await;

    // Its class, in its own words and as text only, and what that has shown.
    let firmware = "1.2 <b>loud</b>";
    assert_eq!(post(&server, &agent, box_with(firmware)).await.status, StatusCode::OK);
    works(&server, &mut agent).await;
    let class = text_of(&page, "class", |text| text.contains("minimal/2: cold came up, kexec not yet")).await;
    assert!(class.contains("Maker Box, firmware 1.2 <b>loud</b>; 1 in service"), "{class}");

    // Its certificate, without a reload: the beginning of its serial number, its end, and why it is over before that.
    let (_, one) = issued(&server, &agent).await;
    let serial = format!("Serial {}…, until 20", &one.serial[..16]);
    let shown = text_of(&page, "certificate", |text| text.contains(&serial)).await;
    assert!(shown.ends_with(" UTC") && !shown.contains("revoked"), "{shown}");
    let title = page.execute("return document.querySelector('#certificate p').title", vec![]).await.unwrap();
    assert_eq!(title, json!(format!("serial {}", one.serial)));
    revoke_key(&server, "rack-1").await;
    let revoked = " UTC; revoked: its machine's identity key was revoked";
    let shown = text_of(&page, "certificate", |text| text.ends_with(revoked)).await;
    assert!(shown.contains(&serial), "{shown}");
    assert_eq!(page.find_all(Locator::Css("#certificate p.failed")).await.unwrap().len(), 1);

    // Nothing of it became a part of the page, and nothing came from elsewhere.
    let made = "return [...document.querySelectorAll('#class p *, #class li *, #certificate p *')].length";
    assert_eq!(page.execute(made, vec![]).await.unwrap(), json!(0));
    let fetched = "return performance.getEntriesByType('resource').map((r) => new URL(r.name).host)";
    let hosts = page.execute(fetched, vec![]).await.unwrap();
    let own = server.http.to_string();
    assert!(hosts.as_array().unwrap().iter().all(|host| *host == json!(own)), "{hosts}");
    // The rack's page has neither.
    page.goto(&format!("http://{}/", server.http)).await.unwrap();
    page.wait().at_most(PATIENCE).for_element(Locator::Css("tr[data-machine=rack-1]")).await.unwrap();
    for hidden in ["class", "certificate"] {
        assert!(!page.find(Locator::Id(hidden)).await.unwrap().is_displayed().await.unwrap(), "{hidden}");
    }
    page.close().await.unwrap();
    drop(driver);
}
