// go run . HOST:PORT USER
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	common "creditmesh/example/gen/creditmesh/common/v1"
	llm "creditmesh/example/gen/creditmesh/llm/v1"
)

func main() {
	address, user := os.Args[1], os.Args[2]
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := llm.NewLLMServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if token := os.Getenv("CREDITMESH_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	messages := []*llm.Message{{
		Role:    llm.Role_ROLE_USER,
		Content: []*llm.Content{{Part: &llm.Content_Text{Text: "Hello, what are you?"}}},
	}}
	most := int32(200)
	stream, err := client.Stream(ctx, &llm.StreamRequest{
		Billing: &common.BillingContext{UserId: user, RequestId: fmt.Sprintf("go-%d", time.Now().UnixNano())}, Messages: messages, MaxOutputTokens: &most,
	})
	if err != nil {
		log.Fatal(err)
	}
	callID := ""
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			log.Fatal(err)
		}
		switch told := event.Event.(type) {
		case *llm.StreamResponse_Started:
			callID = told.Started.CallId
		case *llm.StreamResponse_Delta:
			fmt.Print(told.Delta.Text)
		case *llm.StreamResponse_Finished:
			fmt.Printf("\ncharged %d micro-credits\n", told.Finished.Charge.CreditMicros)
		}
	}
	schema := `{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}`
	answer, err := client.Generate(ctx, &llm.GenerateRequest{
		Billing: &common.BillingContext{UserId: user}, Messages: messages,
		ResponseFormat: &llm.ResponseFormat{Format: &llm.ResponseFormat_JsonSchema{
			JsonSchema: &llm.JsonSchemaFormat{Name: "city", Schema: schema, Strict: true},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("json:", answer.Outputs[0].Message.Content[0].GetText())
	got, err := client.GetCall(ctx, &llm.GetCallRequest{CallId: callID})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("state:", got.Call.State, "attempts:", len(got.Call.Attempts))
	_, err = client.Generate(ctx, &llm.GenerateRequest{Billing: &common.BillingContext{UserId: user}, Model: "no-such-model", Messages: messages})
	fmt.Println("refused:", status.Code(err), status.Convert(err).Message())
}
