//! A running `kiln serve`, and what it answers.

use super::*;

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
}

pub async fn call<S>(stream: S, method: &str, path: &str, headers: &[(&str, &str)], body: Vec<u8>) -> Answer
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    try_call(stream, method, path, headers, body).await.unwrap()
}

pub async fn try_call<S>(
    stream: S,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Result<Answer, hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).unwrap()).uri(path);
    request = request.header("host", "kiln").header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await?;
    let (status, headers) = (response.status(), response.headers().clone());
    let body = response.into_body().collect().await?.to_bytes().to_vec();
    Ok(Answer { status, headers, body })
}

pub struct Server {
    pub child: Child,
    pub http: SocketAddr,
    pub agent: SocketAddr,
    pub socket: PathBuf,
    /// Where people and programs are served over TLS, if they are.
    pub https: Option<SocketAddr>,
    ca: Vec<u8>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts the program and waits until it answers.
    pub async fn start(site: &TestSite) -> Self {
        let log = fs::File::options().create(true).append(true).open(site.path().join("log")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["serve", "--log", "text", "--site"])
            .arg(site.path())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let socket = site.path().join("state/kiln.sock");
        let begun = Instant::now();
        let status = loop {
            if let Ok(stream) = UnixStream::connect(&socket).await
                && let Ok(answer) = try_call(stream, "GET", "/api/v1/status", &[], vec![]).await
            {
                break answer.json();
            }
            let log = || fs::read_to_string(site.path().join("log")).unwrap();
            assert!(child.try_wait().unwrap().is_none(), "it ended: {}", log());
            assert!(begun.elapsed() < PATIENCE, "it does not answer: {}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let address = |what: &str| -> SocketAddr {
            let lines = status["listening"].as_array().unwrap();
            let line = lines.iter().find(|l| l["what"] == what).unwrap();
            line["address"].as_str().unwrap().parse().unwrap()
        };
        let lines = status["listening"].as_array().unwrap();
        let https =
            lines.iter().find(|l| l["what"] == "HTTPS").map(|l| l["address"].as_str().unwrap().parse().unwrap());
        let (http, agent, ca) = (address("HTTP"), address("agent API"), site.online("agent-ca.pem"));
        Self { child, http, agent, socket, https, ca }
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    pub async fn http(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        call(TcpStream::connect(self.http).await.unwrap(), method, path, headers, vec![]).await
    }

    pub async fn order(&self, method: &str, path: &str, body: Value) -> Answer {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        call(stream, method, &format!("/api/v1/{path}"), &[], body.to_string().into_bytes()).await
    }

    /// With a token, over this host's plain HTTP.
    pub async fn with(&self, token: &str, method: &str, path: &str, body: Value) -> Answer {
        let stream = TcpStream::connect(self.http).await.unwrap();
        let bearer = format!("Bearer {token}");
        let body = body.to_string().into_bytes();
        call(stream, method, &format!("/api/v1/{path}"), &[("authorization", &bearer)], body).await
    }

    /// A new token's text.
    pub async fn token(&self, name: &str, role: &str) -> String {
        let answer = self.order("POST", "tokens", json!({ "name": name, "role": role })).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        answer.json()["text"].as_str().unwrap().to_owned()
    }

    /// Over TLS, as a browser or program that trusts the site's CA.
    pub async fn https(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Value) -> Answer {
        let stream = TcpStream::connect(self.https.unwrap()).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.tls(None)));
        let stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        call(stream, method, path, headers, body.to_string().into_bytes()).await
    }

    /// What the audit log says, oldest first.
    pub async fn audit(&self) -> Vec<kiln_server::audit::Record> {
        let answer = self.order("GET", "audit/records", Value::Null).await;
        serde_json::from_slice(&answer.body).unwrap()
    }

    pub async fn machine(&self, name: &str) -> MachineView {
        let answer = self.http("GET", &format!("/api/v1/machines/{name}"), &[]).await;
        serde_json::from_value(answer.json()).unwrap()
    }

    pub async fn assign(&self, name: &str, release: u64) {
        let answer = self.try_assign(name, release).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }

    pub async fn try_assign(&self, name: &str, release: u64) -> Answer {
        let body = json!({ "image": "minimal", "release": release, "via": "kexec" });
        self.order("PUT", &format!("machines/{name}/assignment"), body).await
    }

    /// A TLS client as the agent's; with `identity` as its certificate and key.
    pub fn tls(&self, identity: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&self.ca).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        match identity {
            Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
            None => builder.with_no_client_auth(),
        }
    }

    pub async fn post(&self, config: ClientConfig, body: Vec<u8>) -> Result<Answer, Box<dyn std::error::Error>> {
        self.post_to(REPORT_PATH, config, body).await
    }

    pub async fn post_to(
        &self,
        path: &str,
        config: ClientConfig,
        body: Vec<u8>,
    ) -> Result<Answer, Box<dyn std::error::Error>> {
        let stream = TcpStream::connect(self.agent).await?;
        let name = ServerName::try_from(kiln_release::AGENT_API_NAME)?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
        Ok(try_call(stream, "POST", path, &[], body).await?)
    }
}

/// Waits until the server's status is so.
pub async fn until(server: &Server, done: impl Fn(&Value) -> bool) {
    let begun = Instant::now();
    while !done(&server.http("GET", "/api/v1/status", &[]).await.json()) {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
