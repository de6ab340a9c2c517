package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
)

// request is one that has come to a web service, which answers with what the
// test says.
type request struct {
	body, session string
	answer        chan int
}

// webService is an HTTP service that can go away.
type webService struct {
	*gate
	url      string
	requests chan *request
}

func runWebService(t *testing.T) *webService {
	t.Helper()
	s := &webService{gate: newGate(listen(t)), requests: make(chan *request, 100)}
	h := &httptest.Server{
		Listener: s.gate,
		Config: &http.Server{
			ReadHeaderTimeout: patience,
			ErrorLog:          log.New(io.Discard, "", 0),
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				req := &request{r.Method + " " + string(body), r.Header.Get("X-Cryo-Session"), make(chan int)}
				s.requests <- req
				select {
				case status := <-req.answer:
					w.WriteHeader(status)
				case <-r.Context().Done():
				}
			}),
		},
	}
	h.Start()
	t.Cleanup(h.Close)
	s.url = h.URL
	return s
}

func TestCryoToHTTP(t *testing.T) {
	service, server := runWebService(t), serve(t)
	p := example(t, "cryo_to_http.yaml", nil, "CRYO_URL="+server.url(), "CRYO_TOKEN="+token, "HTTP_URL="+service.url)
	s := server.session(t)
	sent := send(s, "hello")
	req := next(t, service.requests)
	require.Equal(t, "POST hello", req.body)
	require.Equal(t, strconv.FormatUint(s.ID(), 10), req.session)
	wantPending(t, sent, "the service has not answered")
	req.answer <- http.StatusInternalServerError
	req = next(t, service.requests)
	require.Equal(t, "POST hello", req.body, "again")
	wantPending(t, sent, "the service has not taken it")

	service.goAway() // in the middle of a request
	service.wantTries(t, 1)
	wantPending(t, sent, "the service is away")
	service.comeBack()
	req = next(t, service.requests)
	require.Equal(t, "POST hello", req.body, "once more")
	wantPending(t, sent, "the service has not answered")
	req.answer <- http.StatusOK
	require.NoError(t, next(t, sent))
	p.interrupt()
}

func TestWhatAServiceRefusesForGoodBecomesADeadLetter(t *testing.T) {
	service, server := runWebService(t), serve(t)
	path := filepath.Join(t.TempDir(), "letters.jsonl")
	p := example(t, "cryo_to_http_fallback.yaml", nil,
		"CRYO_URL="+server.url(), "CRYO_TOKEN="+token, "HTTP_URL="+service.url, "DEAD_LETTERS="+path)
	s := server.session(t)

	poison := send(s, "poison")
	next(t, service.requests).answer <- http.StatusUnprocessableEntity
	require.NoError(t, next(t, poison))
	var letter struct{ Reason, Session, Base64 string }
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(content, &letter), "exactly one: %s", content)
	require.Contains(t, letter.Reason, "(422)")
	require.Equal(t, strconv.FormatUint(s.ID(), 10), letter.Session)
	require.Equal(t, "cG9pc29u", letter.Base64)

	// Its neighbours in one batch do not.
	batch := []cryo.OutMessage{cryo.Text("before"), cryo.Text("poison"), cryo.Text("behind")}
	done := start(func() error { return s.SendBatch(context.Background(), batch) })
	for range batch {
		req := next(t, service.requests)
		status := http.StatusOK
		if req.body == "POST poison" {
			status = http.StatusUnprocessableEntity
		}
		req.answer <- status
	}
	require.NoError(t, next(t, done))
	content, err = os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, 2, strings.Count(string(content), "\n"), "two letters: %s", content)
	require.Equal(t, 2, strings.Count(string(content), "cG9pc29u"), "of the poison: %s", content)

	service.goAway()
	late := send(s, "late")
	service.wantTries(t, 1)
	wantPending(t, late, "the service is away")
	service.comeBack()
	req := next(t, service.requests)
	require.Equal(t, "POST late", req.body)
	req.answer <- http.StatusInternalServerError
	next(t, service.requests).answer <- http.StatusOK
	require.NoError(t, next(t, late))
	again, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(content), string(again), "only what is refused for good is a dead letter")
	p.interrupt()
}

// answer is what an HTTP caller gets.
type answer struct {
	status      int
	contentType string
	body        string
}

// httpToCryo runs an example that listens for both, and gives the address for
// Cryo clients and a way to post to it, once the pipeline has noticed them. It
// wants posts to fail while nobody is connected.
func httpToCryo(t *testing.T, file string) (p *process, post func(*answer) <-chan error, cryoAddress string) {
	t.Helper()
	wantPatientCallers(t, file)
	address := freeAddress(t)
	p = example(t, file, nil, "CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN="+token, "HTTP_ADDRESS="+address)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	once := func() (answer, error) {
		resp, err := client.Post("http://"+address+"/post", "text/plain", strings.NewReader("hello"))
		if err != nil {
			return answer{}, err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		return answer{resp.StatusCode, resp.Header.Get("Content-Type"), string(body)}, err
	}
	cryoAddress = p.wantLogged("Listening for Cryo clients on ")
	p.wantLogged("Output type cryo_server is now active")
	var nobody answer
	require.EventuallyWithT(t, func(c *assertT) {
		var err error
		nobody, err = once()
		require.NoError(c, err)
	}, patience, 10*time.Millisecond)
	require.GreaterOrEqual(t, nobody.status, 400, "nobody is connected")
	post = func(got *answer) <-chan error {
		return start(func() (err error) {
			for *got = nobody; *got == nobody && err == nil; {
				*got, err = once()
			}
			return err
		})
	}
	return p, post, cryoAddress
}

// wantPatientCallers wants a caller to hear of what became of its message, and
// not of its own time-out before.
func wantPatientCallers(t *testing.T, file string) {
	t.Helper()
	config, err := os.ReadFile("../config/" + file)
	require.NoError(t, err)
	times := make(map[string]time.Duration)
	for _, found := range regexp.MustCompile(`(?m)^ +((?:ack_)?timeout): (\w+)`).FindAllStringSubmatch(string(config), -1) {
		times[found[1]], err = time.ParseDuration(found[2])
		require.NoError(t, err)
	}
	require.Positive(t, times["ack_timeout"])
	require.Greater(t, times["timeout"], times["ack_timeout"])
}

// wantToldWhenAClientLeaves wants an error for what a client has got and not
// acknowledged.
func wantToldWhenAClientLeaves(t *testing.T, post func(*answer) <-chan error, cryoAddress string) {
	t.Helper()
	s := dial(t, cryoAddress)
	var got answer
	answered := post(&got)
	receive(t, s)
	wantPending(t, answered, "not acknowledged yet")
	require.NoError(t, s.Close(contextFor(t), ""))
	require.NoError(t, next(t, answered))
	require.GreaterOrEqual(t, got.status, 400, got.body)
}

func TestHTTPToCryoServer(t *testing.T) {
	p, post, address := httpToCryo(t, "http_to_cryo_server.yaml")
	wantToldWhenAClientLeaves(t, post, address)
	s := dial(t, address)
	var got answer
	answered := post(&got)
	m := receive(t, s)
	require.Equal(t, "hello", string(m.Payload))
	wantPending(t, answered, "not acknowledged yet")
	require.NoError(t, m.Ack())
	require.NoError(t, next(t, answered))
	require.Equal(t, http.StatusOK, got.status)
	p.interrupt()
}

func TestHTTPToCryoWithReply(t *testing.T) {
	p, post, address := httpToCryo(t, "http_to_cryo_with_reply.yaml")
	wantToldWhenAClientLeaves(t, post, address)
	s := dial(t, address)
	var got answer
	answered := post(&got)
	m := receive(t, s)
	wantPending(t, answered, "not acknowledged yet")
	require.NoError(t, m.Ack())
	require.NoError(t, next(t, answered))
	require.Equal(t, http.StatusOK, got.status, got.body)
	require.Equal(t, "application/json", got.contentType)
	var message struct{ ID, Text string }
	require.NoError(t, json.Unmarshal(m.Payload, &message))
	require.Equal(t, "hello", message.Text)
	var reply struct {
		ID          string
		DeliveredAt time.Time `json:"delivered_at"`
	}
	require.NoError(t, json.Unmarshal([]byte(got.body), &reply))
	require.Equal(t, message.ID, reply.ID)
	require.NotZero(t, reply.DeliveredAt)
	p.interrupt()
}

// TestWhatComesTwiceIsPostedOnce gives the example a cache that outlives the
// process, and ends the process while the service fails.
func TestWhatComesTwiceIsPostedOnce(t *testing.T) {
	example, err := os.ReadFile("../config/deduplicate.yaml")
	require.NoError(t, err)
	const memory = "memory: { default_ttl: 24h }"
	require.Contains(t, string(example), memory)
	dir := t.TempDir()
	config := filepath.Join(dir, "deduplicate.yaml")
	require.NoError(t, os.Mkdir(filepath.Join(dir, "delivered"), 0o700))
	require.NoError(t, os.WriteFile(config, bytes.ReplaceAll(example, []byte(memory),
		[]byte(`file: { directory: "`+dir+`/delivered" }`)), 0o600))
	service := runWebService(t)
	run := func() (p *process, address string) {
		p = launch(t, nil, []string{"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN=" + token, "HTTP_URL=" + service.url},
			// The first failure is the broker's, not one after seconds.
			"run", "--set", "http.enabled=false", "--set", "output.broker.outputs.0.http_client.retries=0", config)
		return p, p.wantLogged("Listening for Cryo clients on ")
	}
	texts := numbered(6)
	for i, id := range texts {
		texts[i] = `{"id":"` + id + `"}`
	}
	sendAll := func(s *cryo.Session) (results []<-chan error) {
		for range 2 {
			for _, text := range texts {
				results = append(results, send(s, text))
			}
		}
		return results
	}
	posted := make(map[string]int)
	answer := func(req *request, status int) {
		if status == http.StatusOK {
			posted[req.body]++
		}
		req.answer <- status
	}

	p, address := run()
	s := dial(t, address)
	results := sendAll(s)
	answer(next(t, service.requests), http.StatusInternalServerError)
	next(t, service.requests) // again
	p.kill()                  // nothing is delivered, so nothing may be remembered
	for _, result := range results {
		require.Error(t, next(t, result))
	}

	p, address = run()
	// The first client leaves while its first message is being posted, and
	// another one comes with the same.
	s = dial(t, address)
	results = sendAll(s)
	req := next(t, service.requests)
	require.NoError(t, s.Close(contextFor(t), ""))
	for _, result := range results {
		require.Error(t, next(t, result))
	}
	s = dial(t, address)
	results = sendAll(s)
	answer(req, http.StatusBadGateway)
	for len(posted) < len(texts) {
		answer(next(t, service.requests), http.StatusOK)
	}
	for _, result := range results {
		require.NoError(t, next(t, result))
	}
	for _, result := range sendAll(s) { // long after the delivery
		require.NoError(t, next(t, result))
	}
	require.Empty(t, service.requests)
	for _, text := range texts {
		require.Equal(t, 1, posted["POST "+text], text)
	}
	require.NoError(t, s.Close(contextFor(t), ""))
	p.interrupt()
}
