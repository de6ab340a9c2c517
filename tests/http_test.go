package tests

import (
	"context"
	"encoding/json"
	"net/http"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cryo-connect/cryo-connect/cryo"
	"github.com/cryo-connect/cryo-connect/internal/testkit"
)

func TestMessageIsAcknowledgedWhenTheServiceAcceptsIt(t *testing.T) {
	service, server := testkit.NewWebService(t), testkit.Serve(t)
	p := example(t, "cryo_to_http.yaml", "CRYO_URL="+server.URL(), "HTTP_URL="+service.URL)
	s := server.Session(t)
	sent := testkit.Send(s, "hello")
	req := service.Next()
	require.Equal(t, "POST hello", req.Method+" "+req.Body)
	require.Equal(t, strconv.FormatUint(s.ID(), 10), req.Header.Get("X-Cryo-Session"))
	testkit.WantPending(t, sent, "the service has not responded")
	req.Respond(http.StatusInternalServerError)
	req = service.Next()
	require.Equal(t, "hello", req.Body, "redelivered")
	testkit.WantPending(t, sent, "the service has failed")

	service.SetDown(true) // in the middle of a request
	service.WantAttempt(t)
	testkit.WantPending(t, sent, "the service is down")
	service.SetDown(false)
	req = service.Next()
	require.Equal(t, "hello", req.Body, "redelivered again")
	testkit.WantPending(t, sent, "the service has not responded")
	req.Respond(http.StatusOK)
	require.NoError(t, testkit.Next(t, sent))
	p.Interrupt()
}

func TestPermanentlyRejectedMessageBecomesADeadLetter(t *testing.T) {
	service, server := testkit.NewWebService(t), testkit.Serve(t)
	path := filepath.Join(t.TempDir(), "letters.jsonl")
	p := example(t, "cryo_to_http_fallback.yaml", "CRYO_URL="+server.URL(), "HTTP_URL="+service.URL, "DEAD_LETTERS="+path)
	s := server.Session(t)

	poison := testkit.Send(s, "poison")
	service.Next().Respond(http.StatusUnprocessableEntity)
	require.NoError(t, testkit.Next(t, poison))
	var letter struct{ Reason, Session, Base64 string }
	content := testkit.ReadFile(t, path)
	require.NoError(t, json.Unmarshal([]byte(content), &letter), "exactly one dead letter: %s", content)
	require.Contains(t, letter.Reason, "(422)")
	require.Equal(t, strconv.FormatUint(s.ID(), 10), letter.Session)
	require.Equal(t, "cG9pc29u", letter.Base64)

	// The other messages of its batch do not.
	batch := []cryo.OutMessage{cryo.Text("before"), cryo.Text("poison"), cryo.Text("behind")}
	done := testkit.Go(func() error { return s.SendBatch(context.Background(), batch) })
	for range batch {
		req := service.Next()
		status := http.StatusOK
		if req.Body == "poison" {
			status = http.StatusUnprocessableEntity
		}
		req.Respond(status)
	}
	require.NoError(t, testkit.Next(t, done))
	content = testkit.ReadFile(t, path)
	require.Equal(t, 2, strings.Count(content, "\n"), "two letters: %s", content)
	require.Equal(t, 2, strings.Count(content, "cG9pc29u"), "of the poison: %s", content)

	service.SetDown(true)
	late := testkit.Send(s, "late")
	service.WantAttempt(t)
	testkit.WantPending(t, late, "the service is down")
	service.SetDown(false)
	req := service.Next()
	require.Equal(t, "late", req.Body)
	req.Respond(http.StatusInternalServerError)
	service.Next().Respond(http.StatusOK)
	require.NoError(t, testkit.Next(t, late))
	require.Equal(t, content, testkit.ReadFile(t, path), "only a permanent rejection makes a dead letter")
	p.Interrupt()
}

// httpToCryo runs an example that listens for HTTP requests and for Cryo clients. post
// posts a message, again while no client is connected, and returns the response of the
// first request that a client received. Without a client, requests must fail.
func httpToCryo(t *testing.T, file string) (p *testkit.Process, post func() <-chan testkit.Response, cryoAddress string) {
	t.Helper()
	wantPatientCallers(t, file)
	address := testkit.ReserveAddress(t)
	p = example(t, file, "HTTP_ADDRESS="+address)
	once := func() (testkit.Response, error) {
		return testkit.HTTP(http.MethodPost, "http://"+address+"/post", "hello")
	}
	cryoAddress = p.Listening()
	p.WantLog("Output type cryo_server is now active")
	var nobody testkit.Response
	testkit.Eventually(t, func(c *assert.CollectT) {
		var err error
		nobody, err = once()
		require.NoError(c, err)
	})
	require.GreaterOrEqual(t, nobody.Status, 400, "no client is connected")
	post = func() <-chan testkit.Response {
		responses := make(chan testkit.Response, 1)
		go func() {
			for {
				response, err := once()
				if err != nil || response.Status != nobody.Status || response.Body != nobody.Body {
					responses <- response
					return
				}
			}
		}()
		return responses
	}
	return p, post, cryoAddress
}

// wantPatientCallers wants the HTTP request to time out later than the acknowledgement,
// so that the caller receives the outcome of its message.
func wantPatientCallers(t *testing.T, file string) {
	t.Helper()
	config := testkit.ReadFile(t, "../config/"+file)
	times := make(map[string]time.Duration)
	for _, found := range regexp.MustCompile(`(?m)^ +((?:ack_)?timeout): (\w+)`).FindAllStringSubmatch(config, -1) {
		var err error
		times[found[1]], err = time.ParseDuration(found[2])
		require.NoError(t, err)
	}
	require.Positive(t, times["ack_timeout"])
	require.Greater(t, times["timeout"], times["ack_timeout"])
}

// wantErrorWhenTheClientLeaves wants an HTTP error for a message that a client received
// and did not acknowledge.
func wantErrorWhenTheClientLeaves(t *testing.T, post func() <-chan testkit.Response, cryoAddress string) {
	t.Helper()
	s := testkit.Dial(t, cryoAddress)
	response := post()
	testkit.Receive(t, s)
	require.Empty(t, response, "not acknowledged yet")
	require.NoError(t, s.Close(testkit.Context(t), ""))
	require.GreaterOrEqual(t, testkit.Next(t, response).Status, 400)
}

// wantOKAfterTheAck wants the HTTP request to succeed with the client's acknowledgement,
// not earlier.
func wantOKAfterTheAck(t *testing.T, post func() <-chan testkit.Response, cryoAddress string) (payload []byte, response testkit.Response) {
	t.Helper()
	s := testkit.Dial(t, cryoAddress)
	responses := post()
	m := testkit.Receive(t, s)
	require.Empty(t, responses, "not acknowledged yet")
	require.NoError(t, m.Ack())
	response = testkit.Next(t, responses)
	require.Equal(t, http.StatusOK, response.Status, response.Body)
	return m.Payload, response
}

func TestHTTPRequestSucceedsWhenAClientAcknowledges(t *testing.T) {
	p, post, address := httpToCryo(t, "http_to_cryo_server.yaml")
	wantErrorWhenTheClientLeaves(t, post, address)
	payload, _ := wantOKAfterTheAck(t, post, address)
	require.Equal(t, "hello", string(payload))
	p.Interrupt()
}

func TestHTTPResponseReportsTheDelivery(t *testing.T) {
	p, post, address := httpToCryo(t, "http_to_cryo_with_reply.yaml")
	wantErrorWhenTheClientLeaves(t, post, address)
	payload, response := wantOKAfterTheAck(t, post, address)
	require.Equal(t, "application/json", response.Header.Get("Content-Type"))
	var message struct{ ID, Text string }
	require.NoError(t, json.Unmarshal(payload, &message))
	require.Equal(t, "hello", message.Text)
	var reply struct {
		ID          string
		DeliveredAt time.Time `json:"delivered_at"`
	}
	require.NoError(t, json.Unmarshal([]byte(response.Body), &reply))
	require.Equal(t, message.ID, reply.ID)
	require.NotZero(t, reply.DeliveredAt)
	p.Interrupt()
}

// The example gets a cache in a file, which outlives the process; the process is killed
// while the service fails.
func TestRepeatedMessageIsPostedOnce(t *testing.T) {
	example := testkit.ReadFile(t, "../config/deduplicate.yaml")
	const memory = "memory: { default_ttl: 24h }"
	require.Contains(t, example, memory)
	config := testkit.WriteFile(t, "deduplicate.yaml", strings.ReplaceAll(example, memory, `file: { directory: "`+t.TempDir()+`" }`))
	service := testkit.NewWebService(t)
	run := func() (p *testkit.Process, address string) {
		p = launch(t, []string{"CRYO_ADDRESS=127.0.0.1:0", "CRYO_TOKEN=" + token, "HTTP_URL=" + service.URL},
			// The first failure is the broker's, not one after seconds.
			"run", "--set", "http.enabled=false", "--set", "output.broker.outputs.0.http_client.retries=0", config)
		return p, p.Listening()
	}
	texts := numbered(6)
	for i, id := range texts {
		texts[i] = `{"id":"` + id + `"}`
	}
	sendAll := func(s *cryo.Session) (results []<-chan error) {
		for range 2 {
			for _, text := range texts {
				results = append(results, testkit.Send(s, text))
			}
		}
		return results
	}
	posted := make(map[string]int)
	respond := func(req *testkit.Request, status int) {
		if status == http.StatusOK {
			posted[req.Body]++
		}
		req.Respond(status)
	}

	p, address := run()
	s := testkit.Dial(t, address)
	results := sendAll(s)
	respond(service.Next(), http.StatusInternalServerError)
	service.Next() // the redelivery
	p.Kill()       // nothing is delivered, so the cache must be empty
	for _, result := range results {
		require.Error(t, testkit.Next(t, result))
	}

	p, address = run()
	// The first client disconnects while its first message is being posted; another
	// one sends the same messages.
	s = testkit.Dial(t, address)
	results = sendAll(s)
	req := service.Next()
	require.NoError(t, s.Close(testkit.Context(t), ""))
	for _, result := range results {
		require.Error(t, testkit.Next(t, result))
	}
	s = testkit.Dial(t, address)
	results = sendAll(s)
	respond(req, http.StatusBadGateway)
	for len(posted) < len(texts) {
		respond(service.Next(), http.StatusOK)
	}
	for _, result := range results {
		require.NoError(t, testkit.Next(t, result))
	}
	for _, result := range sendAll(s) { // long after the delivery
		require.NoError(t, testkit.Next(t, result))
	}
	require.Empty(t, service.Requests)
	for _, text := range texts {
		require.Equal(t, 1, posted[text], text)
	}
	require.NoError(t, s.Close(testkit.Context(t), ""))
	p.Interrupt()
}
